"""After a failure: what survivors have, the layer in doubt rolled forward, lost experts loaded anew."""
