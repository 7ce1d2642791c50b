"""Object stores (S3, Google Cloud Storage, Azure Blob) by one client: names, requests, errors."""
