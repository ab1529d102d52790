"""The ``adfq`` command: a file a subcommand, which parses options and prints."""
