"""The drivers: they obey the core, each in its own world, and know nothing of waiting."""
