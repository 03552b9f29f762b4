# Makes a real node of this machine, in the control plane of the directory $1, whose programs are in $2.
#
# containerd and the kubelet keep what they can below the directory. What they change of the machine is noted
# there first, in `before`, and put back by kubelet_end.sh: kernel settings, a bridge, /var/log/pods.
set -eu
cd "$1"
programs=$2
umask 022
mkdir -p node/images node/cni
{
    for setting in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops net/ipv4/ip_forward \
        kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
        [ -e "/proc/sys/$setting" ] && echo "setting $setting $(cat "/proc/sys/$setting")"
    done
    for made in /var/log/pods /var/log/containers /usr/libexec/kubernetes /run/containerd/runc/k8s.io; do
        [ -e "$made" ] || echo "absent $made"
    done
    for hierarchy in /sys/fs/cgroup/*/; do
        [ -e "${hierarchy}k8s.io" ] || echo "absent ${hierarchy}k8s.io"
    done
} >node/before.new
mv node/before.new node/before

# The node's address is its end of the pods' network.
ip link delete upgrade-node0 2>/dev/null || true
ip link add upgrade-node0 type bridge
ip addr add 10.212.0.1/24 dev upgrade-node0
ip link set upgrade-node0 up
cat >node/cni/10-bridge.conflist <<CNI
{ "cniVersion": "0.4.0", "name": "pods", "plugins": [{
    "type": "bridge", "bridge": "upgrade-node0", "isGateway": true,
    "ipam": { "type": "host-local", "dataDir": "$1/node/addresses", "ranges": [[{ "subnet": "10.212.0.0/24" }]],
        "routes": [{ "dst": "0.0.0.0/0" }] } }] }
CNI
cat >node/containerd.toml <<TOML
version = 2
root = "$1/node/containerd"
state = "$1/node/state"
[grpc]
  address = "$1/node/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "upgrade.test/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$programs/cni"
    conf_dir = "$1/node/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
TOML
# In the control plane's directory, by which whoever ends it knows it.
containerd --config node/containerd.toml --log-level warn >containerd.log 2>&1 </dev/null &
echo $! >containerd.pid

# name, command, applets of busybox
image() {
    rm -rf node/images/root && mkdir -p node/images/root/bin node/images/root/tmp node/images/root/etc
    cp /bin/busybox node/images/root/bin/busybox.static
    for applet in $3; do ln node/images/root/bin/busybox.static "node/images/root/bin/$applet"; done
    rm node/images/root/bin/busybox.static
    printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' >node/images/root/etc/passwd
    chmod 1777 node/images/root/tmp
    tar -C node/images/root -cf node/images/layer.tar --owner 0 --group 0 .
    layer=$(sha256sum <node/images/layer.tar | cut -d ' ' -f 1)
    cat >node/images/config.json <<JSON
{ "architecture": "$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')", "os": "linux",
  "config": { "Cmd": $2, "Env": ["PATH=/bin"] }, "rootfs": { "type": "layers", "diff_ids": ["sha256:$layer"] } }
JSON
    echo "[{ \"Config\": \"config.json\", \"RepoTags\": [\"upgrade.test/$1\"], \"Layers\": [\"layer.tar\"] }]" >node/images/manifest.json
    tar -C node/images -cf node/images/image.tar manifest.json config.json layer.tar
    ctr --address node/containerd.sock --namespace k8s.io images import node/images/image.tar >/dev/null
}
tries=100
until ctr --address node/containerd.sock version >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || { tail containerd.log >&2; exit 1; }
    sleep 0.1
done
image pause:1 '["/bin/sleep", "1000000"]' sleep
image busybox:1 '["/bin/sleep", "1000000"]' "$(/bin/busybox --list | tr '\n' ' ')"
image bare:1 '["/bin/sleep", "1000000"]' "sleep echo true"
rm -rf node/images

cat >node/kubelet.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 10.212.0.1
authentication: { anonymous: { enabled: false }, webhook: { enabled: false }, x509: { clientCAFile: $1/pki/ca.crt } }
authorization: { mode: AlwaysAllow }
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
evictionHard: { memory.available: 1Mi, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0% }
failSwapOn: false
healthzPort: 0
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
oomScoreAdj: 0
readOnlyPort: 0
syncFrequency: 1s
YAML
"$programs/kubelet" --config node/kubelet.yaml --kubeconfig pki/admin.kubeconfig --root-dir "$1/node/kubelet" \
    --cert-dir "$1/node/certificates" --hostname-override node --node-ip 10.212.0.1 --container-runtime remote \
    --container-runtime-endpoint "unix://$1/node/containerd.sock" --volume-plugin-dir "$1/node/plugins" \
    >kubelet.log 2>&1 </dev/null &
echo $! >kubelet.pid
