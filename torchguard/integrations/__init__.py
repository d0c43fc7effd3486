"""How is the guard used with frameworks that own the training loop?

Each module needs the package it is named after, and is imported by name: ``torchguard.integrations.lightning``.
"""
