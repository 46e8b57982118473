"""The commands of ``python -m benchmarks``; a module has what one of ``dsnet.commands`` has."""
