"""The native CPU runner: C++ kernels for three instruction sets, the decoder over them, and their binding."""
