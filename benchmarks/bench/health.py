"""Waiting for a server to say that it is healthy."""

import subprocess
import time
import urllib.error
import urllib.request

POLL_SECONDS = 0.2


def becomes_healthy(process: subprocess.Popen, port: int, seconds: float) -> bool:
    """Wait for a server's /health; false once its process has ended, or after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
