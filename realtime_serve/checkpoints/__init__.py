"""Models on disk: what their files say and hold, before any engine makes something of it."""
