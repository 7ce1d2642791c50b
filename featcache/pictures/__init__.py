"""Pictures come from folders, webdataset tars and FFCV files, and are decoded in one way."""
