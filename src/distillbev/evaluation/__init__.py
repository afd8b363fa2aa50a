"""nuScenes detection metrics: matching, average precision, errors, score; results files; what went wrong."""
