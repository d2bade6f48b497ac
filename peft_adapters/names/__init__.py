"""Adapters whose tensor names differ from the base model's modules: mapped exactly, or refused."""
