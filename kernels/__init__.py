"""Device code of dsa_rt: cpu/ and cuda/ are compiled into ``dsa_rt._native``, triton/ is imported from here.

``philox.h`` is the one definition of the noise that C++ and CUDA share.
"""
