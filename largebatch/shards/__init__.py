"""The format of a shard: tar files of records, packed or plain, and their index."""
