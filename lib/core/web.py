"""
HTTP requests; those to this machine go past every proxy, which is for what lies outside.
"""

import http.client
import urllib.parse
import urllib.request

# Refused, reset, timed out, answered with an error, with half a line, or with what is no text.
UNANSWERED = (OSError, http.client.HTTPException, ValueError)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(request, data=None, timeout=300):
    """urllib's urlopen, without a proxy for this machine."""
    url = request if isinstance(request, str) else request.full_url
    is_local = urllib.parse.urlsplit(url).hostname in LOOPBACK
    opener = DIRECT if is_local else urllib.request.build_opener()  # anew: urlopen keeps the proxies of its first call
    return opener.open(request, data, timeout)
