"""Methods of other papers, one small file each."""
