"""The methods, one file each, behind one contract (:mod:`.base`)."""
