"""The sections of a report, a file each, as HTML and inline SVG."""
