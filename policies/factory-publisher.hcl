# The manufacturer's line: publishes lots, and revokes devices. It never deletes, and never changes what is published.
path "{{.Mount}}/data/lots/+/manifest" {
  capabilities = ["create", "read"]
}
path "{{.Mount}}/data/lots/+/shards/+" {
  capabilities = ["create", "read"]
}
# The objects that change, the list of revocations and its parts; each change is a new version, compared and set.
path "{{.Mount}}/data/lots/+/revocations" {
  capabilities = ["create", "read", "update"]
}
path "{{.Mount}}/data/lots/+/revoked/+" {
  capabilities = ["create", "read", "update"]
}
path "{{.Mount}}/metadata/lots" {
  capabilities = ["list"]
}
# What of a lot is published is asked once a run, instead of shard by shard.
path "{{.Mount}}/metadata/lots/+/shards" {
  capabilities = ["list"]
}
path "{{.Mount}}/metadata/lots/+/revoked" {
  capabilities = ["list"]
}
