"""The router: validates, tokenizes, queues, places each request on a prefill and a decode worker, relays its tokens.

Key-value bytes never pass through here, and requests wait here rather than in the workers. It imports no torch.
"""
