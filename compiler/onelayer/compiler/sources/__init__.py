"""The wing that reads users' data: files, folders and Hub data sets in, plain rows out."""
