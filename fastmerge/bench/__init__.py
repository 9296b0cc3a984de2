"""What `fastmerge bench` does, and what the scripts of benchmarks/ are presets of.

Above everything but the command line, and imported by nothing else: it measures the package from
outside, whole processes as users start them, and kernels by their own names.
"""
