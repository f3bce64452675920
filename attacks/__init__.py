"""Built-in attacks: every module here is scanned by the registry."""
