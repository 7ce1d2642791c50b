"""The terminal shows progress bars, tables and reports; commands start and end here."""
