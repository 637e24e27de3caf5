"""The benchmarks are scripts: their modules are found through this folder's conftest."""
