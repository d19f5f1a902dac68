"""The V2 protocol over HTTP/1.1.

`infer` is the hot path, raw ASGI; `app` is everything else, on Starlette; `server` runs both
on uvicorn; `wire` bounds what uvicorn's parser takes; `status` maps error codes.
"""
