"""Eyes: what stands in a picture, read by an optical reader that knows nothing of the model."""
