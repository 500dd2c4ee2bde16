"""The studio: a page in the browser over the same queue as every dialect. Gradio is imported inside functions only."""
