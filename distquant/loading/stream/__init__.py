"""Bytes from files to finished memory: reading ahead, quantizing, handing pieces on, within a staging budget."""
