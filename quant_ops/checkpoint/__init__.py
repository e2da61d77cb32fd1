"""Files: headers, readers, writers, metadata."""
