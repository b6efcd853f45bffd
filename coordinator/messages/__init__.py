"""Every message that is sent; the only room beside the tasks that knows Celery and kombu."""
