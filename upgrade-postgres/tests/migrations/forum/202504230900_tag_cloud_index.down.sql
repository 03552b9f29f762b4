drop index reports.tag_cloud_label;
