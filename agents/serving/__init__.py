"""A trained agent as a service: an HTTP server, its playground page, and a client."""
