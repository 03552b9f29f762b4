# Ends the node of the directory $1 and puts back what it changed of the machine.
for part in kubelet containerd; do
    pid=$(cat "$1/$part.pid" 2>/dev/null)
    # The number alone may be another process's by now.
    [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1" ] && kill -KILL "$pid"
done
# The shims of containers: their command lines name the directory; their children are what ran.
for each in /proc/[0-9]*; do
    { tr '\0' ' ' <"$each/cmdline"; } 2>/dev/null | grep -q "containerd-shim.* $1/node/" || continue
    for child in $(cat "$each"/task/*/children 2>/dev/null); do kill -KILL "$child" 2>/dev/null; done
    kill -KILL "${each#/proc/}" 2>/dev/null
done
# What is killed leaves its socket.
for address in "$1"/node/state/io.containerd.runtime.v2.task/k8s.io/*/address; do
    [ -e "$address" ] && rm -f "$(sed 's|^unix://||' "$address")"
done
[ -e "$1/node/before" ] || exit 0
sleep 0.5
awk -v below="$1/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r |
    while read -r mounted; do umount -l "$mounted" 2>/dev/null; done
ip link delete upgrade-node0 2>/dev/null
while read -r what where value; do
    case $what in
        setting) echo "$value" >"/proc/sys/$where" ;;
        # A cgroup is removed with those in it, and holds no file.
        absent)
            case $where in
                /sys/fs/cgroup/*) find "$where" -depth -type d -exec rmdir {} + 2>/dev/null ;;
                *) rm -rf "$where" ;;
            esac
            ;;
    esac
done <"$1/node/before"
rm "$1/node/before"
