"""The pure core: it decides, a driver obeys.  No clock, lock, thread, event loop, file or random source of its own."""
