"""Parts of the module M4oESegmentation; each is imported when it is needed."""
