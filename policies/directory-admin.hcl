# Whoever looks after the directory: its mount, its policies and the AppRoles that have them. No object of it.
path "sys/mounts/{{.Mount}}" {
  capabilities = ["create", "read", "update"]
}
path "sys/mounts/{{.Mount}}/tune" {
  capabilities = ["read", "update"]
}
path "{{.Mount}}/config" {
  capabilities = ["create", "read", "update"]
}
path "sys/policies/acl/{{.Mount}}-*" {
  capabilities = ["create", "read", "update", "delete"]
}
path "auth/approle/role/{{.Mount}}-*" {
  capabilities = ["create", "read", "update", "delete"]
}
