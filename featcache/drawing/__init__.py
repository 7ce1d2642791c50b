"""Pages and pictures that people look at: HTML that needs no network and no script, and what
targets look like on a view."""
