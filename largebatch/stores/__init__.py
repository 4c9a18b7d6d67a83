"""Bytes of files, on this machine or in a remote store."""
