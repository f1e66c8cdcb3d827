"""Streams weights from files to their final memory: reads ahead, quantizes and sends pieces, within a budget."""
