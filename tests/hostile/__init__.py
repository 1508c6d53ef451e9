"""Input that was made to harm: refused with a clear error, nothing executed, nothing written, in bounded memory."""
