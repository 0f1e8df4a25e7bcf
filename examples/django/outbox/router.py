class Router:
    """Events are published through the application's own connection, and shown through another role's."""

    def db_for_read(self, model, **hints):
        return "operator" if model._meta.model_name in ("eventstatus", "failedevent") else None

    def allow_migrate(self, db, app_label, **hints):
        return False if db == "operator" else None
