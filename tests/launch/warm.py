"""The last that `preloaded` imports: what the first kernel of each process would do anew."""

import gc

from numba.core.registry import cpu_target

cpu_target.target_context.refresh()  # Numba's own functions: half a second
gc.collect()
gc.freeze()  # a collection in a forked process would touch, and so copy, all that has been imported
