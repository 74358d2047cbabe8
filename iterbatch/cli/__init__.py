"""The command line: one file a command, with its flags and its table. Printing happens here only."""
