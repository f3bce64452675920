"""Built-in certifiers: every module here is scanned by the registry."""
