"""The pool that our messages live in, apart from protobuf's common one.

Every Triton client registers messages of the same names there, and a process (a step that asks
another server, a test) may use both.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
