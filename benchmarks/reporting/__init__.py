"""Records as Markdown, CSV and pictures, and the figures of the documents."""
