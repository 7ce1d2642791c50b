"""The terminal: entry point, option types, progress bars, tables and reports."""
