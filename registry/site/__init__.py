"""The registry as web pages: a folder of plain files, or the same pages one by one for a server."""
