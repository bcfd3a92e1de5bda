"""Pages about adapters that open in a browser, without a server, a script or a network."""
