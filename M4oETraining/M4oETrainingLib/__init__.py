"""Parts of the module M4oETraining; each is imported when it is needed."""
