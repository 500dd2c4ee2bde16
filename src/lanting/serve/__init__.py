"""The server: a durable queue before the engine, and a dialect for every kind of client. No torch in its process."""
