"""Alembic's folder: how each schema is made out of the one before."""
