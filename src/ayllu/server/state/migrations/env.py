"""Run by Alembic: migrates inside the transaction that `schema.upgrade` has opened."""

from __future__ import annotations

from alembic import context

from ayllu.server.state.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
