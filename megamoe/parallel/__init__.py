"""How ranks are arranged and how they talk to each other."""
